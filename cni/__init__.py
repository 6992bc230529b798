"""The CNI plugin: addresses, devices and routes of pods."""
