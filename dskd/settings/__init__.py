"""What can be written in a settings file, how it is read, and what is refused."""
