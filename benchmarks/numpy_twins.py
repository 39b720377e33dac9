"""NumPy functions that the cases map in other processes. Each has a JAX twin in the cases. Does not import JAX."""

from __future__ import annotations

import numpy as np

SWINGS = 1000


def pendulum(angles: np.ndarray) -> np.ndarray:
    """The angles of damped pendulums, starting at rest, after SWINGS steps of the Euler-Cromer method."""
    speeds = np.zeros_like(angles)
    for _ in range(SWINGS):
        speeds = speeds * np.float32(0.999) - np.float32(0.01) * np.sin(angles)
        angles = angles + np.float32(0.01) * speeds
    return angles


def call_price(spot: np.ndarray) -> np.ndarray:
    """The Black-Scholes price of a call option for many spots: strike 100, rate 3 %, volatility 20 %, one year.

    Approximates the normal distribution: 1/2 + tanh(√(2/π) (d + 0.044715 d³)) / 2: Page, Applied Statistics 26, 1977.
    """
    d = (np.log(spot / np.float32(100)) + np.float32(0.05)) / np.float32(0.2)
    discount = np.float32(100 * np.exp(-0.03))
    return spot * _normal(d) - discount * _normal(d - np.float32(0.2))


def _normal(d: np.ndarray) -> np.ndarray:
    return np.float32(0.5) + np.float32(0.5) * np.tanh(np.float32(0.7978846) * (d + np.float32(0.044715) * d * d * d))
