"""The planner: time, memory and cost of a run before it starts."""
