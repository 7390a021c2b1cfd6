//! The `enforcer` binary.

use std::process::ExitCode;

use enforcer::{
    cli,
    dataplane::{
        Dataplane, DataplaneError,
        kernel::{KernelDataplane, LoadOptions},
    },
};

fn main() -> ExitCode {
    cli::main(open)
}

/// Loads the kernel programs for images of `image_words` words and a table of `flows`.
fn open(image_words: u32, flows: u32, debug: bool) -> Result<Box<dyn Dataplane>, DataplaneError> {
    let options = LoadOptions {
        image_words: image_words as usize,
        debug,
        flows,
    };
    Ok(Box::new(KernelDataplane::load(&options)?))
}
