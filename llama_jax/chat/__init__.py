"""Conversations: their messages, the formats that models were tuned on, and their token ids."""
