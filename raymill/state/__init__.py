"""The state that training changes, in flat buffers: laid out, divided among ranks, updated,
gathered, copied."""
