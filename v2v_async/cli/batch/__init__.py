"""``v2v-async batch``: many guests, from a plan."""
