//! The `enforcer` binary.

use std::process::ExitCode;

use enforcer::{
    cli,
    dataplane::{Dataplane, DataplaneError},
};

fn main() -> ExitCode {
    cli::main(open)
}

/// Loads the kernel programs for images of `image_words` words.
fn open(_image_words: u32, _debug: bool) -> Result<Box<dyn Dataplane>, DataplaneError> {
    Err(DataplaneError::Environment {
        what: "this build has no kernel programs".to_owned(),
        help: "build the enforcer with `cargo xtask build`".to_owned(),
    })
}
