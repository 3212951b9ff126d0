"""The lab: what a person types and sees. It builds tasks and rewards, and hands them to the engine."""
