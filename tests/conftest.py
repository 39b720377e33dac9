"""Eight simulated devices for every test."""

import replicax

replicax.simulate_devices(8)
