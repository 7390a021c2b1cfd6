//! Network namespaces of the tests.
