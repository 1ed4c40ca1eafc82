"""Generation: a model's step recorded as a program, pools of rows that it runs on, sampling, sessions, text."""
