"""Which layers could a model do without? Finds paths on some texts, judges them on others."""
