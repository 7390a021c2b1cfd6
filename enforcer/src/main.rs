//! The `enforcer` binary.

use std::process::ExitCode;

use enforcer::{
    cli,
    dataplane::{
        Dataplane, DataplaneError,
        flows::DEFAULT_FLOWS,
        kernel::{KernelDataplane, LoadOptions},
    },
};

fn main() -> ExitCode {
    cli::main(open)
}

/// Loads the kernel programs for images of `image_words` words.
fn open(image_words: u32, debug: bool) -> Result<Box<dyn Dataplane>, DataplaneError> {
    let options = LoadOptions {
        image_words: image_words as usize,
        debug,
        flows: DEFAULT_FLOWS,
    };
    Ok(Box::new(KernelDataplane::load(&options)?))
}
