"""The grammar of the built-in stories, and what a line of it may contain.

A story is OPENING, one of PLOTS, and ENDING. Each of these is a list of steps, marked by dashes.
The lines of a step are alternatives, all equally likely. A line may contain

    {colour}     a word of the rule "colour", drawn at its first use in a story and then remembered
    {colour2}    another word of that rule, always different from {colour}; the number only names the variable
    {a colour}   the word in another form (FORMS), here "an orange"; {he}, {his} and {him} are forms of {name}
    [colour]     a word of the rule, drawn each time and not remembered; [a colour] is such a word in another form
    [rain|snow]  one of the alternatives given

A form that begins with a capital letter gives one: {His}. Names, animals, colours and places stay the same from
sentence to sentence, which a model has to learn. A choice costs log2 of the number of its alternatives, in bits.

The sum of these costs is the information of a text only if no text can be produced in two ways. So no two alternatives
and their continuations give the same letters (as "old oak" + "tree" and "old" + "oak tree" would), and a drawn word is
always spelled out, not only referred to as "he". The whole text then determines every choice. The tests prove this for
the grammar as it is, and fail if a new word or line breaks it.
"""


def words(text: str) -> list[str]:
    """Return the words of a rule."""
    return [" ".join(word.split()) for word in text.split(",")]


# Few, so that a small model soon sees each of them often enough to learn to remember it.
BOYS = words("Pip, Max, Otto, Milo")
GIRLS = words("Lily, Ruby, Clara, Nora")

# How one is at a place: "by the pond", "in the forest".
PLACES = {
    **dict.fromkeys(words("pond, lake, river, stream, canal, brook, fountain, sea"), "by"),
    **dict.fromkeys(words("forest, meadow, garden, orchard, valley, village, park, marsh, wood, town"), "in"),
    **dict.fromkeys(words("hill, beach, farm, island, heath, moor, mountain, shore"), "on"),
    **dict.fromkeys(words("mill, bridge, waterfall, lighthouse, cave, castle, market, barn, harbour"), "near"),
}

WEEKDAYS = words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")

RULES = {
    # Who there is, and what they are like.
    "name": ", ".join(BOYS + GIRLS),
    "animal": "rabbit, mouse, fox, bear, hedgehog, duck, frog, owl",
    "trait": """kind, brave, shy, clever, cheerful, gentle, curious, playful, friendly, polite, patient, quiet, lively,
        careful, dreamy, helpful, thoughtful, merry, eager, modest, generous, adventurous, bold, tidy, wise, funny,
        loyal, hopeful, busy, calm, lucky, imaginative, sleepy, jolly, nimble, sensible, warm-hearted, lazy, stubborn,
        forgetful""",
    "family": "mother, father, grandmother, grandfather, aunt, uncle, sister, brother, cousin, godmother",
    "pet": """crickets, beetles, ladybirds, butterflies, fireflies, snails, moths, ants, bees, caterpillars, spiders,
        dragonflies, worms, grasshoppers, tadpoles, goldfish""",
    "funny": """noisy, sleepy, polite, friendly, silly, cheeky, shiny, jolly, grumpy, lazy, spotted, giggling, fat,
        round, striped, singing, clever, nervous, dancing, hungry, purple, fluffy, sneezing, elegant""",
    # What there is to have and to love.
    "colour": "red, blue, green, yellow, purple, orange, white, pink",
    "thing": "kite, ball, drum, bell, book, key, flute, umbrella",
    "hat": "hat, coat, cloak, jacket, jumper, waistcoat, shawl, dress",
    "lantern": "lantern, lamp, candlestick, torch",
    "basket": "bag, box, bowl, sack, hamper, bundle, tub, crate",
    "food": """apples, berries, honey, pancakes, muffins, biscuits, cherries, plums, nuts, cheese, bread, soup,
        porridge, jam, carrots, pears, cakes, waffles, noodles, peaches, grapes, figs, toast, peas, buns, tarts,
        dumplings, mushrooms, strawberries, chestnuts, raisins, custard, pudding, popcorn, oranges, beans, radishes,
        pies, salad, chocolate, apricots, lettuce, turnips, gingerbread, marmalade, potatoes, onions, sandwiches,
        melons, stew, dates, pretzels, doughnuts, toffee, almonds, rice""",
    "tasty": """tasty, delicious, sweet, fresh, lovely, yummy, wonderful, splendid, excellent, superb, delightful,
        heavenly, scrumptious, marvellous""",
    "joy": """long walks, warm rain, old songs, bright stars, bedtime stories, picnics, puzzles, windy days, snow,
        riddles, jokes, puddles, treasure hunts, daydreams, pirates, dancing, music, moonlight, sunsets, parties,
        parades, painting, rainbows, dragons, fairy tales, soft clouds, brave knights, magic, tall ships, distant
        lands, giants, autumn leaves, secret maps, castles, mermaids, sleepy owls, flying carpets, snowmen, acrobats,
        summer nights, clowns, the moon, deep caves, wild geese, wizards, talking trees, hot-air balloons, the sea""",
    "moral": """a friend is worth more than gold, everything is easier together, nobody is too small to help, kindness
        comes back, two are braver than one, friends can be found everywhere, it is good to have a friend, good friends
        never give up""",
    "flower": """rose, tulip, poppy, lily, orchid, pansy, daisy, iris, dahlia, peony, crocus, carnation, petunia,
        primrose, aster, hyacinth""",
    "project": """boat, swing, wagon, raft, bench, tower, cart, fort, house, playhouse, sledge, seesaw, birdhouse, bed,
        hut, rocking horse""",
    "material": """planks, ropes, sticks, nails, logs, branches, bricks, barrels, wheels, stones, boxes, pegs, screws,
        poles, tiles, reeds""",
    "tool": "hammer, saw, ladder, axe, rake, spade, shovel, wheelbarrow",
    "crash": "crash, bang, bump, thud, clatter, rumble, crack, snap",
    "skill": """swim, whistle, skate, dance, juggle, sing, climb, paint, fish, sew, knit, read, bake, sail, ski, row,
        draw, write, cook, count, hop on one leg, stand on one leg, tell jokes, do magic""",
    # Where and when.
    "place": ", ".join(PLACES),
    "scenic": """quiet, sunny, misty, windy, green, old, lonely, shady, wide, hidden, peaceful, muddy, sleepy, silent,
        breezy, pretty, little, lovely, famous, beautiful, snowy, golden, far-off, magic, foggy, cheerful, nearby,
        wild""",
    "snug": """cosy, snug, tiny, tidy, warm, crooked, wooden, sunny, neat, old, narrow, pretty, round, bright, small,
        cheerful""",
    "house": "cottage, house, hut, den, cabin, home, caravan, tent, burrow, shed",
    "spot": "[under|behind|beside|near|beneath|next to] [landmark]",
    "landmark": "the [mossy] [log]",
    "mossy": """mossy, old, big, small, crooked, dusty, round, wet, broad, tall, lonely, sunny, grey, pretty, wide,
        long, short, huge, tiny, leaning, broken, shady, heavy, strange, smooth, rough, ancient, muddy, narrow,
        painted""",
    "log": """log, rock, bush, fence, hedge, haystack, bench, oak, stump, barrel, cart, ladder, gate, wall, tree,
        wheelbarrow, boulder, willow, trough, rosebush, birch, pine, fir, statue, scarecrow, signpost, beehive, maple,
        sundial, pump""",
    "weather": """sunny, bright, misty, windy, cold, warm, rainy, frosty, cloudy, golden, quiet, crisp, breezy, snowy,
        foggy, lovely, hot, grey, chilly, mild, dewy, stormy, cool, pale, peaceful, still, calm, beautiful, dull,
        damp""",
    "starry": """dark, misty, windy, cold, rainy, frosty, cloudy, starry, quiet, snowy, foggy, chilly, stormy, still,
        moonlit, black""",
    "daytime": "morning, afternoon, evening, day",
    "weekday": ", ".join(WEEKDAYS),
    "days": "hours, days, weeks, months",
    "number": "two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, twenty",
    # What they do and feel.
    "ran": """ran, walked, skipped, hurried, wandered, danced, marched, strolled, trotted, scampered, raced, rushed,
        bounced, dashed, tiptoed, rambled, hopped, jumped, strode, sauntered, galloped, waddled, crept, sped""",
    "sobbed": "sobbed, sighed, cried, whispered, wept, wailed, sniffed, mumbled, groaned, moaned, stammered, said",
    "cheered": "cheered, laughed, sang, shouted, giggled, called, cried, chuckled, exclaimed, said, squealed, cooed",
    "sad": """sad, worried, unhappy, upset, gloomy, miserable, lonely, troubled, glum, tearful, tired, sorry, hopeless,
        discouraged, downcast, weary, helpless, nervous, anxious, puzzled, grumpy, forlorn""",
    "happy": """happy, glad, proud, joyful, cheerful, delighted, merry, thankful, pleased, excited, grateful,
        overjoyed, content, jolly, relieved, hopeful""",
}

OPENING = """
    - Once upon a time there was {a trait} little {animal} named {name} {Animal}, who loved {joy}, {joy2} and {food}.
      Once upon a time there lived {a trait} and {trait2} {animal} named {name} {Animal} with [number] [funny] [pet].
      Once upon a time {a trait} {animal} named {name} {Animal} lived in [a snug] [house] {at place2} the [scenic] {place2}.
      Once upon a time there was {a trait} young {animal} named {name} {Animal}, who had {a colour8} [hat] and {a colour9} bed.
      Once upon a time, {at place2} the {place2}, there lived {a trait} {animal} named {name} {Animal} with {his} [family].
"""

PLOTS = {
    "a thing is lost": """
    - One [weather] [daytime] {name} lost {his} {colour} {thing} {at place} the [scenic] {place}.
      One [weather] [daytime] {name} [ran] to the [scenic] {place} with {a colour} {thing}, but came home without it.
    - "Where is my {thing}?" [sobbed] {name}, looking [spot] and [spot].
      {name} looked [spot] and [spot], {sad} and {sad2}.
    - {A trait3} {animal2} named {name2} {Animal2} [ran] over with {a colour2} [lantern] to help {him}.
      Then came {name2} {Animal2}, {a trait3} {animal2} in {a colour2} [hat], and asked, "May I help you?"
    - Together they found {a colour3} {thing2}, {a colour4} {thing3} and {a thing4}, but no {thing}.
      {name} and {name2} searched [spot], [spot] and [spot].
    - At last {name2} {Animal2} saw something {colour} [spot], and it was the {thing}!
      "Here it is!" [cheered] {name2}, and there, [spot], lay the {colour} {thing}.
    """,
    "a meal is shared": """
    - One [weather] [daytime] {name} took {food3}, {food4} and {food5} to the [scenic] {place} in {a colour} [basket].
      On [weekday] {name} [ran] to the [scenic] {place} with {a colour} [basket] of [tasty] {food3} and {food4}.
    - There, [spot], sat {a trait3} {animal2} named {name2} {Animal2}, {sad} and {sad2}.
      There {name} met {name2} {Animal2}, {a trait3} {animal2} in {a colour2} [hat], who looked {sad} and {sad2}.
    - "I have eaten only {food6} and {food7} since [weekday]," [sobbed] {name2}.
      "I dropped my {food6} and my {food7} [spot]," [sobbed] {name2}.
    - {name} {Animal} was hungry too, but {name} gave {name2} half of the {food3} and all of the {food4}.
      "Let us share!" [cheered] {name} {Animal}, and {name2} ate [number] helpings of {food3} and {food4}.
    - {name2} had nothing to give but {a colour3} {thing} and a song about {joy3} and {joy4}.
      Soon {name2} {Animal2} felt {happy} and {happy2}, and {name} and {name2} sat [spot] and sang about {joy3}.
    """,
    "a thing is built": """
    - One [weather] [daytime] {name} began to build {a colour} {project} {at place} the [scenic] {place}.
      {name} wished for {a colour} {project}, and on [weekday] {name} began to build it {at place} the [scenic] {place}.
    - {name2} {Animal2}, {a trait3} {animal2}, came to help with {a tool}, [number] {material} and {food3}.
      {A trait3} {animal2} named {name2} {Animal2} [ran] over with {a tool}, [number] {material} and [tasty] {food3}.
    - {name} and {name2} worked for [number] [days] and ate {food4} and {food5}, but the {project} fell down with a [crash].
      But one [weather] [daytime] a [strong|cold|wild|sudden] wind came, and the {project} broke with a [crash].
    - "We will never finish it," [sobbed] {name} {Animal}, {sad} and {sad2}, but {name2} did not give up.
      "Think of {joy3} and {joy4}," said {name2} {Animal2}, "and let us try again!"
    - This time they tied it to [landmark] with {a colour2} [rope|ribbon|string|chain], and it held.
      {name} and {name2} brought [number] [longer|better|thicker|stronger] {material2}, and soon the {colour} {project} was ready.
    """,
    "a guest comes in from the storm": """
    - One [weather] [daytime] a storm came over the [scenic] {place} while {name} was eating [tasty] {food3}.
      One [weather] [daytime] dark clouds rolled over the [scenic] {place}, and {name} [ran] home.
    - Soon {a trait3} {animal2} named {name2} {Animal2} knocked [number] times at the {colour} door, {sad} and wet.
      "Please let me in," [sobbed] {name2} {Animal2}, {a trait3} {animal2} in {a colour} [hat], {sad} and wet.
    - {name} {Animal} gave {name2} {a colour2} [blanket|towel|pillow|rug] and [tasty] {food4} with {food5}.
      "Come in!" [cheered] {name} {Animal}, and {name} brought {a colour2} [blanket|towel|pillow|rug] and [tasty] {food4}.
    - {name} and {name2} played with {a thing2}, {a thing3} and {a thing4} until the [rain|storm|wind|thunder] stopped.
      {name} and {name2} talked about {joy3}, {joy4} and {joy5} until the [rain|storm|wind|thunder] stopped.
    - When the sun came out, {name2}, {happy} and {happy2}, gave {name} {a colour3} {thing}.
      Then a rainbow stood over the {place}, and {name} and {name2} danced [spot], {happy} and {happy2}.
    """,
    "a skill is learned": """
    - On [weekday] {name} [ran] to the [scenic] {place} to learn to {skill} like {his} [family].
      One [weather] [daytime], {at place} the [scenic] {place}, {name} tried to {skill} like {his} [family].
    - {name} practised [spot] and [spot], but it always went wrong.
      "I will never {skill}!" [sobbed] {name} {Animal}, {sad} and {sad2}, and hid [spot].
    - {A trait3} {animal2} named {name2} {Animal2} [ran] over and gave {him} {a colour} {thing} for luck.
      "I can help you," said {name2} {Animal2}, {a trait3} {animal2} with {a colour} {thing}.
    - Every [weekday] they practised {at place} the {place} and ate [tasty] {food3} and {food4}.
      "Try again and think of {joy3} and {joy4}!" said {name2} {Animal2} every [daytime].
    - After [number] [days] {name} could {skill}, {happy} and {happy2}, with the {colour} {thing} beside {him}.
      And on [weekday] {name} held the {colour} {thing} up high and could {skill} at last!
    """,
    "a present is bought": """
    - It was the birthday of {his} friend {name2} {Animal2}, {a trait3} {animal2} who dreamed of {a colour} {thing}.
      On [weekday] {his} friend {name2} {Animal2}, {a trait3} {animal2}, had a birthday and wished for {a colour} {thing}.
    - But {name} had only [number] coins, so {name} sold {food3}, {food4} and {food5} {at place} the [scenic] {place}.
      So {name} [ran] to the [scenic] {place} and carried {food3} for {a trait4} {animal3} to earn [number] coins.
    - Then {name} bought the {thing} and wrapped it in {colour2} [paper|leaves|silk|cloth] with {a colour3} ribbon.
      Then {name} bought the {thing} and hid it [spot] in {a colour2} [basket].
    - "Happy birthday!" [cheered] {name} {Animal}, and {name2} opened it, {happy} and {happy2}.
      "Is the {colour} {thing} for me?" [cheered] {name2} {Animal2}, {happy} and {happy2}.
    - {name} and {name2} ate [tasty] {food6} and {food7} [spot] and sang about {joy3}.
      {name} and {name2} ate [tasty] {food6}, {food7} and {food8} and danced around [landmark].
    """,
    "a noise is heard in the night": """
    - One [starry] night something [squeaked|howled|moaned|rustled] {at place} the [scenic] {place}.
      One [starry] night {name} heard a [strange|loud|soft|sad] [squeak|howl|moan|cry] {at place} the [scenic] {place}.
    - {name} took {a colour} [lantern] and woke {his} friend {name2} {Animal2}, {a trait3} {animal2}.
      "Come with me!" {name} said to {name2} {Animal2}, {a trait3} {animal2} with {a colour} [lantern].
    - {name} and {name2} tiptoed [bravely|slowly|quietly|carefully|softly|nervously] past [landmark] and [landmark].
      "It must be [a funny] [ghost|monster|dragon|giant|witch|pirate|troll|wolf]," whispered {name} [spot].
    - But [spot] sat only a [little|small|young|tiny] {animal3}, {sad} and lost.
      "I am lost," [sobbed] a [little|small|young|tiny] {animal3} [spot].
    - {name} and {name2} gave the {animal3} [tasty] {food3} and {food4} and took it home to its [family].
      {name} and {name2} carried it home, and its [family] gave them {food3}, {food4} and {a colour2} {thing}.
    """,
    "a flower grows": """
    - One [weather] [daytime] {name} found a seed {at place} the [scenic] {place} and put it in {a colour} pot [spot].
      {His} [family] gave {him} a seed from the [scenic] {place}, and {name} put it in {a colour} pot.
    - Every [daytime] {name} watered the pot and told it about {joy3} and {joy4}.
      Every [weekday] {name} watered the pot and sang about {joy3}, {joy4} and {joy5}.
    - But after [number] [days] there was nothing to see, and {name} {Animal} was {sad} and {sad2}.
      "Nothing grows in my {colour} pot," [sobbed] {name} {Animal}, {sad} and {sad2}.
    - "Wait a little," said {name2} {Animal2}, {a trait3} {animal2}, and brought [tasty] {food3} and {food4}.
      {A trait3} {animal2} named {name2} {Animal2} [ran] over to wait with {him}, and {name} and {name2} ate [tasty] {food3}.
    - Then, one [weather] [daytime], there was {a colour2} {flower}, as tall as {a animal3}!
      Then, on [weekday], there was {a colour2} {flower}, and even [number] [funny] [pet] came to see it.
    """,
}

ENDING = """
    - After that, {name} {Animal} and {name2} {Animal2} met every [weekday] to share stories about {joy9}.
      From then on {name} {Animal} and {name2} {Animal2} were always together, and they never ran out of {food9}.
      That night {name} {Animal} dreamed of {joy8}, {joy9} and {name2} {Animal2}.
      And so {name} {Animal} learned from {name2} {Animal2} that [moral].
      "What a [wonderful|lovely|perfect|splendid] friend you are!" said {name2} {Animal2}, and {name} smiled.
"""
