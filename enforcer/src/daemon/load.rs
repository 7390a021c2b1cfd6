//! From paths to a policy, settings and their image: read, parse, run the policy's own tests,
//! compile.

use crate::{
    compile::{self, CompileError, Image, Known},
    policy::{
        self, Cache, Diagnostic, SourceFile, diag,
        model::{Environment, Policy},
        reference,
    },
    settings::{self, Settings},
};

use super::{
    files::{self, FilesError, Sources, Texts},
    progress::{Progress, Stage},
};

/// A policy that may judge packets.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// What was read.
    pub texts: Texts,
    /// What it means.
    pub policy: Policy,
    /// What passes before it is asked.
    pub settings: Settings,
    /// What its author should look at.
    pub warnings: Vec<Diagnostic>,
    /// Generation 1; see [`Image::with_generation`].
    pub image: Image,
    /// For the next time.
    pub memory: Memory,
}

/// What reading and compiling one version of a policy spares the next.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// What the files say.
    pub texts: Cache,
    /// What the image is made of.
    pub image: Known,
}

/// Why a path gives no such policy.
#[derive(Debug)]
pub enum Rejected {
    /// Nothing to parse.
    Files(FilesError),
    /// Mistakes, or failing tests.
    Policy {
        /// What was read.
        files: Vec<SourceFile>,
        /// Errors, and warnings beside them.
        diagnostics: Vec<Diagnostic>,
    },
    /// Mistakes in the settings.
    Settings {
        /// What was read.
        files: Vec<SourceFile>,
        /// Errors; those of the policy follow, if it has some.
        diagnostics: Vec<Diagnostic>,
    },
    /// Too large.
    Compile(CompileError),
}

impl Rejected {
    /// For a terminal; ends with a newline.
    pub fn render(&self, color: bool) -> String {
        match self {
            Self::Files(error) => format!("error: {error}\n"),
            Self::Policy { files, diagnostics } | Self::Settings { files, diagnostics } => {
                diag::render_all(diagnostics, files, color)
            }
            Self::Compile(error) => format!("error: {error}\n"),
        }
    }

    /// Errors with their places, and warnings beside them.
    pub fn diagnostics(&self) -> &[Diagnostic] {
        match self {
            Self::Policy { diagnostics, .. } | Self::Settings { diagnostics, .. } => diagnostics,
            Self::Files(_) | Self::Compile(_) => &[],
        }
    }

    /// What happened, in few words.
    pub fn headline(&self) -> &'static str {
        match self {
            Self::Settings { .. } => "the settings were refused",
            Self::Policy { .. } | Self::Files(_) | Self::Compile(_) => "the policy was refused",
        }
    }

    /// One line, for a log or a list.
    pub fn summary(&self) -> String {
        match self {
            Self::Files(error) => error.summary(),
            Self::Policy { diagnostics, .. } | Self::Settings { diagnostics, .. } => {
                let errors: Vec<_> = diagnostics
                    .iter()
                    .filter(|d| d.severity == policy::Severity::Error)
                    .collect();
                let Some(first) = errors.first() else {
                    return "there are no errors".to_owned();
                };
                let more = match errors.len() - 1 {
                    0 => String::new(),
                    n => format!(" (and {n} more)"),
                };
                format!("{}:{}: {}{more}", first.file, first.line, first.message)
            }
            Self::Compile(error) => error.to_string(),
        }
    }
}

/// Reads and compiles policy and settings.
///
/// # Errors
/// [`Rejected`].
pub fn load(
    sources: &Sources,
    environment: &Environment,
    progress: &Progress,
) -> Result<Loaded, Rejected> {
    progress.enter(Stage::Reading);
    let texts = files::read_all(sources).map_err(Rejected::Files)?;
    compile_again(texts, environment, &mut Memory::default(), progress)
}

/// The settings in `texts`, and what their author should look at.
///
/// # Errors
/// Their mistakes.
pub fn settings(texts: &Texts) -> Result<(Settings, Vec<Diagnostic>), Vec<Diagnostic>> {
    match &texts.settings {
        Some(file) => settings::parse(file),
        None => Ok((Settings::default(), Vec::new())),
    }
}

/// Compiles what is read already.
///
/// # Errors
/// [`Rejected`], but [`Rejected::Files`].
pub fn compile(texts: Texts, environment: &Environment) -> Result<Loaded, Rejected> {
    compile_again(
        texts,
        environment,
        &mut Memory::default(),
        &Progress::default(),
    )
}

/// The image of a policy, compared with it, above all where it is another one than before.
///
/// # Errors
/// [`CompileError`].
pub fn image(
    policy: &Policy,
    settings: &Settings,
    environment: &Environment,
    known: &mut Known,
    progress: &Progress,
) -> Result<Image, CompileError> {
    progress.enter(Stage::Compiling);
    let changed = known.changed(policy);
    let image = compile::compile_again(policy, environment, &settings.options(), known)?;
    progress.enter(Stage::Validating);
    // What is wrong may be in what is known: the next one begins anew.
    compile::validate_changes(policy, environment, &image, &changed)
        .inspect_err(|_| *known = Known::default())?;
    Ok(image)
}

/// [`compile`] for one who has compiled other versions of the same files.
///
/// # Errors
/// As [`compile`].
pub fn compile_again(
    texts: Texts,
    environment: &Environment,
    memory: &mut Memory,
    progress: &Progress,
) -> Result<Loaded, Rejected> {
    progress.enter(Stage::Parsing);
    let outcome = memory.texts.parse(&texts.policy);
    let (settings, mut warnings) = match settings(&texts) {
        Ok(settings) => settings,
        Err(mut diagnostics) => {
            diagnostics.extend(outcome.err().into_iter().flatten());
            let files = texts.all();
            return Err(Rejected::Settings { files, diagnostics });
        }
    };
    let refused = |diagnostics| Rejected::Policy {
        files: texts.all(),
        diagnostics,
    };
    let outcome = outcome.map_err(refused)?;
    progress.enter(Stage::Testing);
    // A policy is good or not wherever it is checked: its tests know no host's addresses.
    let failures = reference::run_tests(&outcome.policy, &Environment::default());
    if !failures.is_empty() {
        return Err(refused([outcome.warnings, failures].concat()));
    }
    let known = &mut memory.image;
    let image = image(&outcome.policy, &settings, environment, known, progress);
    let image = image.map_err(Rejected::Compile)?;
    warnings.extend(outcome.warnings);
    Ok(Loaded {
        texts,
        policy: outcome.policy,
        settings,
        warnings,
        image,
        memory: memory.clone(),
    })
}

#[cfg(test)]
mod tests {
    use enforcer_common::image::{essential, header};

    use super::*;

    fn texts(policy: &str, settings: Option<&str>) -> Texts {
        let file = |name: &str, text: &str| SourceFile {
            name: name.to_owned(),
            text: text.to_owned(),
        };
        Texts {
            policy: vec![file("p.yaml", policy)].into(),
            settings: settings.map(|text| file("/etc/enforcer.yaml", text)),
        }
    }

    #[test]
    fn settings_come_into_the_image() {
        let policy = "version: 1\nsegments: {a: {members: [{cidr: 10.0.0.0/8}]}}\n";
        let essentials = |settings| {
            let loaded = compile(texts(policy, settings), &Environment::default()).unwrap();
            loaded.image.words()[header::ESSENTIALS as usize]
        };
        assert_eq!(essentials(None), essential::ALL);
        let off = Some("version: 1\nessentials: {off: [arp, nd]}\n");
        assert_eq!(
            essentials(off),
            essential::ALL & !(essential::ARP | essential::ND)
        );
    }

    #[test]
    fn mistakes_of_settings_and_policy_come_together() {
        let broken = texts("version: 1\nsegmnts: {}\n", Some("version: 2\n"));
        let rejected = compile(broken, &Environment::default()).unwrap_err();
        assert_eq!(rejected.headline(), "the settings were refused");
        let codes: Vec<_> = rejected.diagnostics().iter().map(|d| d.code).collect();
        assert_eq!(codes, ["E0110", "E0101"]);
        let summary = rejected.summary();
        assert!(summary.starts_with("/etc/enforcer.yaml:1: "), "{summary}");
        let text = rejected.render(false);
        assert!(
            text.contains("1 | version: 2") && text.contains("2 | segmnts"),
            "{text}"
        );
    }

    #[test]
    fn tests_of_a_policy_know_no_host() {
        let text = "\
version: 1
segments:
  db: { members: [{cidr: 10.10.1.0/24}] }
rules:
  - {name: from-here, from: [host], to: [db], services: [tcp/5432]}
tests:
  - {from: 192.0.2.7, to: 10.10.1.5, service: tcp/5432, expect: deny}
";
        let files = || texts(text, None);
        let here = Environment {
            host_addresses: ["192.0.2.7".parse().unwrap()].into(),
            ..Environment::default()
        };
        let elsewhere = compile(files(), &Environment::default()).unwrap();
        let here = compile(files(), &here).unwrap();
        assert_ne!(elsewhere.image.hash(), here.image.hash());
    }
}
