"""What exists because there are many ranks: parallel.py and dispatch.py. What each of them updates: ../owners.py."""
