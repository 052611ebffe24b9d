"""The workers as one of them sees the others: messages, meetings, and the proof of a step."""
