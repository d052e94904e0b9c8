"""What the library costs: times, memory and precision, measured."""
