"""The sweep over the checkpoints of the Hub: read with distrust, measured, planned."""
