"""Turn texts, chats and pictures into rows of tokens and what a vision tower reads."""
