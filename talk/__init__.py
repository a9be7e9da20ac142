"""Text from a trained model: text.py (loading, prompts, continuations), and three ways to talk with it beside the
command line of generate.py: chat.py (the terminal), web.py with page.html (a browser), notebook.py (Jupyter).
"""
