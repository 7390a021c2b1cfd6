//! The parser on whole files.

use super::*;
