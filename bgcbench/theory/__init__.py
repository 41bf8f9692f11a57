"""What is known without measuring: closed forms, least squares, and the figures the paper prints."""
