"""Sets up a YubiHSM 2 from one reviewed file, and copies its keys to a second one.

declaration   the file: what the device is to hold
plan          the steps that this takes, pure data
setup         takes them, all or none
clone         copies keys from device to device under a wrap key
"""
