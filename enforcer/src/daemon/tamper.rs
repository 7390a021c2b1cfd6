//! Notices that somebody changed what the daemon put into the kernel, says so, and has it put back.

use std::{
    collections::BTreeSet,
    sync::PoisonError,
    time::{Duration, Instant},
};

use crate::{
    api::types::{Record, TamperVerdict, Tampered, Time},
    dataplane::{Beside, Dataplane, Tamper},
};

use super::state::Shared;

/// The image is read back whole this often: 64 MiB take tens of milliseconds.
const READ_BACK: Duration = Duration::from_secs(60);

/// What was found, and not mended yet.
#[derive(Debug, Default)]
pub struct Watchman {
    open: BTreeSet<(String, String)>,
    beside: Vec<Beside>,
    error: Option<String>,
    read_back: Option<Instant>,
}

impl Watchman {
    /// Looks once. `restored` are interfaces that had lost their programs and have them again.
    pub fn look(&mut self, shared: &Shared, restored: Vec<String>) {
        for interface in restored {
            let tamper = Tamper {
                target: interface,
                what: "had lost its programs".to_owned(),
                repaired: true,
            };
            tell(shared, &tamper);
        }
        let due = self
            .read_back
            .is_none_or(|last| last.elapsed() >= READ_BACK);
        let looked = {
            let mut dataplane = shared
                .dataplane
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            dataplane.inspect().and_then(|mut found| {
                let beside = dataplane.beside();
                if beside != self.beside {
                    beside
                        .iter()
                        .map(other)
                        .for_each(|what| tracing::error!("{what}"));
                    self.beside = beside;
                }
                if due {
                    self.read_back = Some(Instant::now());
                    found.extend(other_image(&mut **dataplane, shared)?);
                }
                Ok(found)
            })
        };
        match looked {
            Ok(found) => {
                self.error = None;
                let mut open = BTreeSet::new();
                for tamper in found {
                    let name = (tamper.target.clone(), tamper.what.clone());
                    // What cannot be mended is told once.
                    if tamper.repaired || !self.open.contains(&name) {
                        tell(shared, &tamper);
                    }
                    if !tamper.repaired {
                        open.insert(name);
                    }
                }
                self.open = open;
            }
            Err(error) => {
                let error = format!("cannot look whether somebody changed the programs: {error}");
                if self.error.as_ref() != Some(&error) {
                    tracing::error!("{error}");
                }
                self.error = Some(error);
            }
        }
    }

    /// What is wrong and stays so.
    pub fn problems(&self) -> impl Iterator<Item = String> {
        let open = self.open.iter();
        let beside = self.beside.iter().filter(|b| !b.interfaces.is_empty());
        open.map(|(target, what)| format!("{target} {what}"))
            .chain(beside.map(other))
            .chain(self.error.clone())
    }

    /// What is not wrong, but should be known.
    pub fn warnings(&self) -> impl Iterator<Item = String> {
        let beside = self.beside.iter().filter(|b| b.interfaces.is_empty());
        beside.map(other)
    }
}

/// Says of another enforcer where it is, and how to be rid of it.
fn other(beside: &Beside) -> String {
    let names: Vec<_> = beside.interfaces.iter().map(String::as_str).collect();
    let names = names.join(", ");
    match &beside.pins {
        Some(pins) if names.is_empty() => {
            let pins = pins.display();
            format!(
                "what is pinned in {pins} is another enforcer's, for this network namespace: if it \
                 is not wanted, `enforcer detach --pins {pins}` takes it off"
            )
        }
        Some(pins) => {
            let pins = pins.display();
            format!(
                "another enforcer, pinned in {pins}, judges as well on {names}, each by its own \
                 policy: end it if it runs, then take it off with `enforcer detach --pins {pins}`"
            )
        }
        None => format!(
            "another enforcer, pinned nowhere that is known, judges as well on {names}, each by its \
             own policy: end it"
        ),
    }
}

/// Compares what judges with what was compiled.
fn other_image(
    dataplane: &mut dyn Dataplane,
    shared: &Shared,
) -> Result<Option<Tamper>, crate::dataplane::DataplaneError> {
    if dataplane.on_trial()?.is_some() {
        return Ok(None); // Which of the two it is depends on the time.
    }
    let live = shared.live();
    let Some(image) = dataplane.read_back()? else {
        return Ok(None);
    };
    // A swap may have come in between; the next look sees it.
    let same = image.words() == live.image.words();
    if same || image.generation() > live.image.generation() {
        return Ok(None);
    }
    let repaired = dataplane.apply(&live.image).is_ok();
    Ok(Some(Tamper {
        target: "the image in force".to_owned(),
        what: "is not what was compiled".to_owned(),
        repaired,
    }))
}

fn tell(shared: &Shared, tamper: &Tamper) {
    let Tamper {
        target,
        what,
        repaired,
    } = tamper;
    if *repaired {
        tracing::warn!("tampered with: {target} {what}; it is as it was again");
    } else {
        tracing::error!("tampered with: {target} {what}, and cannot be put right");
    }
    shared.store.push(Record::Tampered(Tampered {
        time: Time::now(),
        verdict: TamperVerdict::Tamper,
        target: target.clone(),
        what: what.clone(),
        repaired: *repaired,
    }));
}
