//! The daemon under test.
