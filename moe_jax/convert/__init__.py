"""Models from elsewhere and back."""
