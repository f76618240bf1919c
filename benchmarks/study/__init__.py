"""What the head is worth: the same detector trained with and without it, many times."""
