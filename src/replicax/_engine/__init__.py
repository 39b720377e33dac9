"""The engine: from the program of one replica to lanes and devices."""
