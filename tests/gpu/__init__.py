"""Is what a card computes right? Checks that run on any device, by pytest (`-m gpu`) or without it (`python -m tests.gpu`)."""
