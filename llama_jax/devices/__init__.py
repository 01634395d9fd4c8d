"""Devices: sharding of arrays, processes of a job, hardware data, memory, and compilation."""
