//! YAML → policy → image → verdict, against the reference interpreter.

use std::collections::BTreeSet;

use enforcer::{
    compile::{Image, Options, compile},
    policy::{
        arbitrary,
        diag::render_all,
        model::{Environment, FlowQuery, Policy},
        parse::{SourceFile, parse_with_warnings},
        reference,
    },
};
use enforcer_common::{
    decide::{Ask, At, Decision, Query, answer, decide},
    image::essential,
    verdict::Reason,
};
use proptest::{
    strategy::{Strategy as _, ValueTree as _},
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};

use super::{packets::outcome_of, script::ENVIRONMENT};

/// Longer texts are cut: what they add is time.
const LONGEST: usize = 8192;
/// Flows asked about.
const QUERIES: usize = 24;

/// Reads, compiles and asks; panics where something does not hold.
pub fn run(data: &[u8]) {
    let text = String::from_utf8_lossy(&data[..data.len().min(LONGEST)]).into_owned();
    let lines = text.split(['\n', '\r']).count();
    let files = [SourceFile {
        name: "fuzz.yaml".to_owned(),
        text,
    }];
    let (policy, findings) = match parse_with_warnings(&files) {
        Ok(outcome) => (Some(outcome.policy), outcome.warnings),
        Err(errors) => {
            assert!(!errors.is_empty(), "a refusal says why");
            (None, errors)
        }
    };
    for finding in &findings {
        assert_eq!(finding.file, "fuzz.yaml");
        let line = usize::try_from(finding.line).unwrap();
        assert!((1..=lines).contains(&line), "{finding:?} of {lines} lines");
        assert!(
            finding.column >= 1 && finding.end_column > finding.column,
            "{finding:?}"
        );
    }
    let shown = render_all(&findings, &files, false);
    let controls = |c: char| c.is_control() && c != '\n';
    assert!(
        !shown.contains(controls),
        "{shown:?} would reach a terminal"
    );
    let Some(policy) = policy else {
        return;
    };
    // Around the ends of a few rules; a rule without end knows no time.
    let ends = policy.rules.iter().filter_map(|rule| rule.expires).take(3);
    let mut moments: BTreeSet<u64> = ends.flat_map(|end| [end - 1, end]).collect();
    moments.extend([0, u64::MAX >> 1]);
    let mut runner = TestRunner::new_with_rng(Config::default(), random(data));
    for env in [&Environment::default(), &*ENVIRONMENT] {
        let wrong = reference::run_tests(&policy, env);
        render_all(&wrong, &files, true);
        let options = Options {
            generation: 1,
            essentials: essential::ALL,
            ..Options::default()
        };
        let Ok(image) = compile(&policy, env, &options) else {
            continue;
        };
        assert_eq!(
            Image::from_words(image.words().to_vec()).as_ref(),
            Ok(&image)
        );
        let queries = arbitrary::query(&policy);
        for _ in 0..QUERIES {
            let query = queries.new_tree(&mut runner).unwrap().current();
            for unix in &moments {
                compare(&policy, env, &image, &query, *unix);
            }
        }
    }
}

/// A generator that the input decides.
fn random(data: &[u8]) -> TestRng {
    let mut seed = [0x5a_u8; 32];
    for (at, byte) in data.iter().enumerate() {
        let slot = &mut seed[at % 32];
        *slot = slot.rotate_left(3).wrapping_mul(31) ^ byte;
    }
    TestRng::from_seed(RngAlgorithm::ChaCha, &seed)
}

fn compare(policy: &Policy, env: &Environment, image: &Image, query: &FlowQuery, unix: u64) {
    let asked = Query {
        source: query.src.into(),
        destination: query.dst.into(),
        protocol: query.protocol,
        selector: query.selector,
    };
    let got = decide(image.words(), &asked, unix);
    let want = reference::judge(policy, env, query, unix);
    assert_eq!(got.outcome, outcome_of(want.outcome), "{query:?} at {unix}");
    assert_eq!(got.rule, want.rule.map_or(u32::MAX, |r| r.0), "{query:?}");
    assert_eq!(
        got.segment,
        want.guard.map_or(u32::MAX, |g| g.0),
        "{query:?}"
    );

    let form = Ask::rules(&asked).form(Reason::Malformed);
    let got = Decision::unpack(answer(image.words(), &form, &At(unix)));
    let (outcome, guard) = reference::judge_form(policy, env, Some((query.src, query.dst)));
    assert_eq!(got.outcome, outcome_of(outcome), "form, {query:?}");
    assert_eq!(
        got.segment,
        guard.map_or(u32::MAX, |g| g.0),
        "form, {query:?}"
    );
}
