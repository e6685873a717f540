"""Operations with more than one implementation: a reference that defines each, and faster ones."""
