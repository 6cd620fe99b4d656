"""What a plan does to answers and what it saves, beside full depth in the same run."""
