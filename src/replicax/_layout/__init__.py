"""The layout of replicas on devices: plain values, computed without tracing."""
