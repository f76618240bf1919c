"""What a release consists of: the sources, a wheel of each library, and trials of both."""
