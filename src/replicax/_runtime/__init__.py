"""Runs calls: signatures, dispatch, compiled programs, host-to-device transfers, ahead-of-time stages."""
