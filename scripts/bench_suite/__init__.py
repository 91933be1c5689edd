"""The benchmark behind ``scripts/bench``; ``__main__.py`` says what it measures."""
