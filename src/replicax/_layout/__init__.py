"""Where replicas lie: plain values, computed without tracing."""
