"""From texts, chats and pictures to rows of tokens and what a vision tower reads."""
