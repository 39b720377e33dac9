"""The engine: lowers the program of one replica to lanes and devices."""
