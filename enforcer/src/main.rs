//! The `enforcer` binary.

use std::process::ExitCode;

use enforcer::{
    cli::{self, Kernel},
    dataplane::{
        Dataplane, DataplaneError,
        kernel::{KernelDataplane, LoadOptions},
    },
};

fn main() -> ExitCode {
    cli::main(open)
}

/// Adopts what is pinned, if anything is; with a number, loads the kernel programs for images of so
/// many words.
fn open(
    kernel: &Kernel,
    image_words: Option<u32>,
) -> Result<Option<Box<dyn Dataplane>>, DataplaneError> {
    let options = LoadOptions {
        image_words: image_words.unwrap_or(0) as usize,
        debug: kernel.debug,
        flows: kernel.flows,
        keep: kernel.keep.clone(),
        anew: kernel.anew,
        extra: &[],
    };
    let dataplane = match image_words {
        None => KernelDataplane::adopt(&options)?,
        Some(_) => Some(KernelDataplane::load(&options)?),
    };
    Ok(dataplane.map(|dataplane| Box::new(dataplane) as Box<dyn Dataplane>))
}
