"""Devices: how arrays lie on them, how their processes meet, what they can do, and how programs are compiled for them."""
