"""Everything that is measured on one card, in minutes: `python -m benchmarks.gpu`. Each part runs in a process of its own."""
