"""What a head decides on its way: gates, offsets, modulation and switches, and a figure of them."""
