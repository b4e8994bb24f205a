"""What single MLP neurons do."""
