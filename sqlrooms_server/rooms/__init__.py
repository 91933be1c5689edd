"""Rooms: documents in processes of their own, and what waits for them.

The documents are Loro's, which holds the interpreter lock while it works: a large one would stop
the server for a second. So they live in child processes (``process``, ``documents``), each driven
by one thread of the server (``driver``), which hands what is to be stored to the store, and what
came of it to the loop.
"""
