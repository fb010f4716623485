"""What a train step costs, from its compilation for devices that are not there."""
