//! What an earlier daemon has left at work, and how this one goes on from there.

use std::sync::Arc;

use crate::{
    compile::Image,
    dataplane::{Adopted, Dataplane},
    policy::SourceFile,
};

use super::{
    RunError,
    environment::Host,
    files::Texts,
    load::{self, Loaded, Rejected},
};

/// What was there at the start.
#[derive(Default)]
pub struct Before {
    /// The kernel with programs and maps of an earlier daemon.
    pub dataplane: Option<Box<dyn Dataplane>>,
    /// What they do.
    pub adopted: Adopted,
    /// Why the policy in force is not the one in the files.
    pub refused: Option<Rejected>,
}

impl Before {
    /// Asks the kernel.
    ///
    /// # Errors
    /// What it says.
    pub fn of(dataplane: Box<dyn Dataplane>) -> Result<Self, RunError> {
        let adopted = dataplane.adopted()?.unwrap_or_default();
        tracing::info!(
            generation = adopted.live.as_ref().map(Image::generation),
            interfaces = adopted.slots.len(),
            "adopted what an earlier enforcer has left at work"
        );
        Ok(Self {
            dataplane: Some(dataplane),
            adopted,
            refused: None,
        })
    }

    /// A start without a policy that can be read: what was in force stays, and its names are not
    /// known.
    ///
    /// # Errors
    /// `rejected` when nothing was in force.
    pub fn without(&mut self, rejected: Rejected, host: &Host) -> Result<Loaded, RunError> {
        let Some(image) = &self.adopted.live else {
            return Err(RunError::Policy(rejected));
        };
        let nothing = Texts {
            policy: Arc::new(vec![SourceFile {
                name: "unknown".to_owned(),
                text: "version: 1\n".to_owned(),
            }]),
            settings: None,
        };
        let Ok(mut loaded) = load::compile(nothing, &host.environment) else {
            return Err(RunError::Policy(rejected));
        };
        tracing::error!(
            error = rejected.summary(),
            "{}: what was in force before stays",
            rejected.headline()
        );
        loaded.image = image.clone();
        loaded.texts = Texts::default();
        self.refused = Some(rejected);
        Ok(loaded)
    }
}
