"""Do token weights help? Policies trained with every kind, compared by true reward at equal KL; see docs/quality.md."""
