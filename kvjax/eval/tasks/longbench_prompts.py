# ruff: noqa: RUF001 (Chinese punctuation)
"""LongBench's prompts, answer lengths and metrics: the benchmark's own parameters, verbatim.

Source: THUDM/LongBench @2e00731f, LongBench/config/{dataset2prompt,dataset2maxlen}.json (with
their typing errors) and eval.py (MIT licence). Metrics are names of `kvjax.eval.tasks.metrics`.
"""

from typing import NamedTuple


class Prompt(NamedTuple):
    """A task's template with {context} and {input}, most new tokens, and metric."""

    template: str
    new_tokens: int
    metric: str


PROMPTS = {
    "narrativeqa": Prompt(
        "You are given a story, which can be either a novel or a movie script, and a question. "
        "Answer the question asconcisely as you can, using a single phrase if possible. Do not "
        "provide any explanation.\n\nStory: {context}\n\nNow, answer the question based on the "
        "story asconcisely as you can, using a single phrase if possible. Do not provide any "
        "explanation.\n\nQuestion: {input}\n\nAnswer:",
        128,
        "f1",
    ),
    "qasper": Prompt(
        "You are given a scientific article and a question. Answer the question as concisely as "
        "you can, using a single phrase or sentence if possible. If the question cannot be "
        'answered based on the information in the article, write "unanswerable". If the '
        'question is a yes/no question, answer "yes", "no", or "unanswerable". Do not '
        "provide any explanation.\n\nArticle: {context}\n\n Answer the question based on the "
        "above article as concisely as you can, using a single phrase or sentence if possible. "
        "If the question cannot be answered based on the information in the article, write "
        '"unanswerable". If the question is a yes/no question, answer "yes", "no", or '
        '"unanswerable". Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:',
        128,
        "f1",
    ),
    "multifieldqa_en": Prompt(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following "
        "question based on the above text, only give me the answer and do not output any other "
        "words.\n\nQuestion: {input}\nAnswer:",
        64,
        "f1",
    ),
    "multifieldqa_zh": Prompt(
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n现在请基于上面的文章回答下面的问题，"
        "只告诉我答案，不要输出任何其他字词。\n\n问题：{input}\n回答：",
        64,
        "f1-zh",
    ),
    "hotpotqa": Prompt(
        "Answer the question based on the given passages. Only give me the answer and do not "
        "output any other words.\n\nThe following are given passages.\n{context}\n\nAnswer the "
        "question based on the given passages. Only give me the answer and do not output any "
        "other words.\n\nQuestion: {input}\nAnswer:",
        32,
        "f1",
    ),
    "2wikimqa": Prompt(
        "Answer the question based on the given passages. Only give me the answer and do not "
        "output any other words.\n\nThe following are given passages.\n{context}\n\nAnswer the "
        "question based on the given passages. Only give me the answer and do not output any "
        "other words.\n\nQuestion: {input}\nAnswer:",
        32,
        "f1",
    ),
    "musique": Prompt(
        "Answer the question based on the given passages. Only give me the answer and do not "
        "output any other words.\n\nThe following are given passages.\n{context}\n\nAnswer the "
        "question based on the given passages. Only give me the answer and do not output any "
        "other words.\n\nQuestion: {input}\nAnswer:",
        32,
        "f1",
    ),
    "dureader": Prompt(
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n"
        "问题：{input}\n回答：",
        128,
        "rouge-l-zh",
    ),
    "gov_report": Prompt(
        "You are given a report by a government agency. Write a one-page summary of the "
        "report.\n\nReport:\n{context}\n\nNow, write a one-page summary of the report.\n\n"
        "Summary:",
        512,
        "rouge-l",
    ),
    "qmsum": Prompt(
        "You are given a meeting transcript and a query containing a question or instruction. "
        "Answer the query in one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the "
        "query based on the above meeting transcript in one or more sentences.\n\nQuery: "
        "{input}\nAnswer:",
        512,
        "rouge-l",
    ),
    "multi_news": Prompt(
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n"
        "{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:",
        512,
        "rouge-l",
    ),
    "vcsum": Prompt(
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n"
        "会议总结：",
        512,
        "rouge-l-zh",
    ),
    "trec": Prompt(
        "Please determine the type of the question below. Here are some examples of "
        "questions.\n\n{context}\n{input}",
        64,
        "line-classification",
    ),
    "triviaqa": Prompt(
        "Answer the question based on the given passage. Only give me the answer and do not "
        "output any other words. The following are some examples.\n\n{context}\n\n{input}",
        32,
        "line-f1",
    ),
    "samsum": Prompt(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n"
        "{context}\n\n{input}",
        128,
        "line-rouge-l",
    ),
    "lsht": Prompt(
        "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}",
        64,
        "line-classification",
    ),
    "passage_count": Prompt(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. "
        "Please carefully read these paragraphs and determine how many unique paragraphs there "
        "are after removing duplicates. In other words, how many non-repeating paragraphs are "
        "there in total?\n\n{context}\n\nPlease enter the final count of unique paragraphs after "
        "removing duplicates. The output format should only contain the number, such as 1, 2, 3, "
        "and so on.\n\nThe final answer is: ",
        32,
        "count",
    ),
    "passage_retrieval_en": Prompt(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which "
        "paragraph the abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n"
        "{input}\n\nPlease enter the number of the paragraph that the abstract is from. The "
        'answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
        32,
        "retrieval",
    ),
    "passage_retrieval_zh": Prompt(
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n"
        "{context}\n\n下面是一个摘要\n\n{input}\n\n请输入摘要所属段落的编号。"
        '答案格式必须是"段落1"，"段落2"等格式\n\n答案是：',
        32,
        "retrieval-zh",
    ),
    "lcc": Prompt(
        "Please complete the code given below. \n{context}Next line of code:\n",
        64,
        "edit-similarity",
    ),
    "repobench-p": Prompt(
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
        64,
        "edit-similarity",
    ),
}

# Of these the benchmark's authors put the prompt into no chat template (pred.py).
PLAIN = frozenset({"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"})
