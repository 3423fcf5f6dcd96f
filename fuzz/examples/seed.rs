//! Writes the seeds to `corpus/`: to be run after a change of the formats or of the seeds.

use std::path::Path;

fn main() -> std::io::Result<()> {
    for (target, _) in gleaner_fuzz::TARGETS {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("corpus")
            .join(target);
        std::fs::create_dir_all(&folder)?;
        for (name, bytes) in gleaner_fuzz::seeds::of(target) {
            std::fs::write(folder.join(name).with_extension("seed"), bytes)?;
        }
    }
    Ok(())
}
