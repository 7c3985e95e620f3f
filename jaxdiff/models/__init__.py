"""The networks, one file per published architecture. They know shapes, not noise schedules."""
