"""Which units stay: masks, their projection onto a budget, their adaptation to hardware."""
